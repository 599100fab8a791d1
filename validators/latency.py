"""What the time of a request is made of, and how many such times become a few figures. All times in seconds.

The definitions are NVIDIA's (NIM benchmarking guide, "Metrics", docs.nvidia.com/nim/benchmarking/llm; AIPerf, the
successor of GenAI-Perf, "Metrics Reference", docs.nvidia.com/aiperf):

    TTFT     request to first token that holds text: queueing, prefill and, over HTTP, the network
    latency  request to last token
    ITL      (latency - TTFT) / (output tokens - 1): the first token is not in it
    TPOT     the same figure under vLLM's name: its mean per request (vllm/benchmarks/serve.py calculate_metrics)
    goodput  completed requests per second that meet every limit of the SLO
    tokens per second per user: output tokens / latency of one request; of a system: output tokens of all requests
             / (last answer - first request). 1 / ITL is the decode speed of one user.

vLLM also calls the single gaps between answers ITL (AIPerf: inter-chunk latency). Here `itl` is NVIDIA's mean of a
request, and the percentiles under "itl_s" are those of the gaps, which show the stutter that a mean hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lconvert.errors import OptionError

_RESAMPLES = 2000


@dataclass(frozen=True)
class Request:
    """One answered request. seconds: when each token, or chunk of tokens, was there, counted from the request.

    tokens: output tokens, which are more than len(seconds) where a server sends several in one chunk.
    """

    seconds: tuple[float, ...]
    tokens: int
    last: float | None = None  # when the answer was complete, if that was later than the last chunk of text

    @property
    def ttft(self) -> float:
        return self.seconds[0]

    @property
    def latency(self) -> float:
        return self.seconds[-1] if self.last is None else self.last

    @property
    def itl(self) -> float | None:
        """None for a request of one token, which has no gap."""
        return (self.latency - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in pairwise(self.seconds))


@dataclass(frozen=True)
class Slo:
    """Limits in seconds that a good request meets; None does not limit."""

    ttft: float | None = None
    tpot: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """'ttft=0.5,tpot=0.05', either part alone too. OptionError for anything else."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                limits[name.strip()] = float(value)
            except ValueError:
                raise OptionError(f"SLO {text!r}: {part!r} is not NAME=SECONDS") from None
        if set(limits) - {"ttft", "tpot"} or not all(0 < v < float("inf") for v in limits.values()):
            raise OptionError(
                f"SLO {text!r}: give ttft and tpot as positive seconds, such as ttft=0.5,tpot=0.05"
            )
        return cls(**limits)

    def met(self, request: Request) -> bool:
        if self.ttft is not None and request.ttft > self.ttft:
            return False
        return self.tpot is None or request.itl is None or request.itl <= self.tpot

    def to_json(self) -> dict[str, float | None]:
        return {"ttft_s": self.ttft, "tpot_s": self.tpot}


def goodput(
    requests: Sequence[Request], duration: float, slo: Slo, sent: int | None = None
) -> dict[str, Any]:
    """Good requests per second over `duration` seconds, and their share of the `sent` requests, failed ones too."""
    good = sum(map(slo.met, requests))
    return {
        "slo": slo.to_json(),
        "requests_per_s": good / duration if duration > 0 else 0.0,
        "share": good / max(len(requests) if sent is None else sent, 1),
    }


def spread(values: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Median of repetitions and how far it can be trusted; None without values.

    ci: the middle 95% of the medians of resamples (percentile bootstrap); with few repetitions it is close to
    min and max, which is the honest answer. mad: median absolute deviation from the median.
    """
    if not values:
        return None
    x = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(x), (_RESAMPLES, len(x)))
    low, high = np.percentile(np.median(x[drawn], axis=1), (2.5, 97.5))
    return {
        "median": float(np.median(x)),
        "min": float(x.min()),
        "max": float(x.max()),
        "mad": float(np.median(np.abs(x - np.median(x)))),
        "ci": [float(low), float(high)],
        "runs": [float(v) for v in x],
    }


def percentiles(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and percentiles (linear between neighbours) of `n` values; None without values."""
    if not values:
        return None
    x = np.asarray(values, np.float64)
    p50, p90, p99 = (float(v) for v in np.percentile(x, (50, 90, 99)))
    return {"n": len(x), "mean": float(x.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(x.max())}


def timings(requests: Sequence[Request]) -> dict[str, Any]:
    """ttft_s, itl_s, tpot_s and latency_s of requests, the form that every result shares.

    itl_s: mean of NVIDIA's ITL over requests, percentiles of single gaps; tpot_s: over requests.
    """
    means = [r.itl for r in requests if r.itl is not None]
    gaps = percentiles([g for r in requests for g in r.gaps])
    return {
        "ttft_s": percentiles([r.ttft for r in requests]),
        "itl_s": gaps and gaps | {"mean": float(np.mean(means))},
        "tpot_s": percentiles(means),
        "latency_s": percentiles([r.latency for r in requests]),
    }
