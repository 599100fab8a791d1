"""Reports as JUnit XML, which CI systems show as tests: one suite per artifact and tier, one case per gate.

A gate that failed is a <failure> with what was measured and what was asked; what could not be checked is <skipped>; a
figure that no gate judges is a property of its suite. The form is the common one (Jenkins' junit-10.xsd; GitHub's and
GitLab's reporters): testsuites > testsuite > properties, testcase > failure | skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from lconvert.validators import show
from lconvert.validators.report import TIERS

_REST = "not proven"


def junit(reports: Sequence[Mapping[str, Any]]) -> str:
    """An XML document with the suites of all reports (lconvert.report/2), in their order."""
    root = ElementTree.Element("testsuites", name="lconvert validate")
    seen: dict[str, int] = {}
    for report in reports:
        name = show.name(report["candidate"])
        seen[name] = seen.get(name, 0) + 1
        _suites(root, report, name if seen[name] == 1 else f"{name} ({seen[name]})")
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(s.get(count, "0")) for s in root)))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suites(root: ElementTree.Element, report: Mapping[str, Any], artifact: str) -> None:
    known = {*TIERS, *(c["tier"] for c in report["checks"])}
    skipped: dict[str, list[str]] = {}
    for line in report["not_proven"]:
        tier = line.partition(":")[0]
        skipped.setdefault(tier if tier in known else _REST, []).append(line)
    tiers = list(dict.fromkeys([*(c["tier"] for c in report["checks"]), *skipped]))
    for tier in tiers:
        checks = [c for c in report["checks"] if c["tier"] == tier]
        judged = [c for c in checks if c["passed"] is not None]
        lines = skipped.get(tier, [])
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_plain(f"{artifact}: {tier}"),
            tests=str(len(judged) + len(lines)),
            failures=str(sum(not c["passed"] for c in judged)),
            errors="0",
            skipped=str(len(lines)),
            time="0",
            timestamp=_plain(report["created"]).split("+")[0],
        )
        properties = ElementTree.SubElement(suite, "properties")
        figures = [(c["name"], c["value"]) for c in checks if c["passed"] is None]
        for key, value in (*_properties(report), *figures):
            ElementTree.SubElement(properties, "property", name=_plain(key), value=_plain(value))
        for check in judged:
            _case(suite, f"{artifact}.{tier}", check)
        for line in lines:
            case = ElementTree.SubElement(
                suite, "testcase", name=_plain(line), classname=_plain(f"{artifact}.{tier}"), time="0"
            )
            ElementTree.SubElement(case, "skipped", message=_plain(line))


def _case(suite: ElementTree.Element, place: str, check: Mapping[str, Any]) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", name=_plain(check["name"]), classname=_plain(place), time="0"
    )
    if check["passed"] is False:
        says = f"measured {check['value']}; gate {check['gate']}"
        failure = ElementTree.SubElement(case, "failure", message=_plain(says), type="gate")
        numbers = [(k, check.get(k)) for k in ("measured", "limit")]
        failure.text = _plain("\n".join([says, *(f"{k}: {v!r}" for k, v in numbers if v is not None)]))


def _properties(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    details = report["details"]
    out = [
        ("lconvert", str(report["lconvert"])),
        ("reference", str(report["reference"])),
        ("candidate", str(report["candidate"])),
    ]
    if sha256 := details.get("artifact", {}).get("sha256"):
        out.append(("candidate.sha256", str(sha256)))
    for r in details.get("runtimes", ()):
        role = r.get("role", "runtime")
        out += [(f"{role}.{k}", str(v)) for k, v in r.items() if k != "role" and v is not None]
    return out


def _plain(text: Any) -> str:
    """A text without the characters that XML 1.0 forbids, each written as its code."""
    return re.sub(
        r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", lambda m: f"\\x{ord(m[0]):02x}", str(text)
    )
