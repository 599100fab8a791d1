"""Texts on which tokenizers are compared: what a pre-tokenizer, a normalizer or a special token can stumble over.

All of it was written for this purpose, except the openings of books in the public domain (Melville, Tolstoy, Cervantes,
Cao Xueqin, Natsume Soseki, the Thousand and One Nights), which stand for running text in their languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

#: kind -> texts. Every text is valid Unicode without lone surrogates; U+0000 is left out because llama.cpp's API
#: takes it and most chat servers do not.
TEXTS: Mapping[str, tuple[str, ...]] = {
    "prose": (
        ("Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and "
        "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part "
        "of the world."),
        "“It is,” he said, “what it's always been; they're late, we've lost, I'd say, and she'll know I'm right.”",
        "DON'T SHOUT: IT'S LATE, I'M TIRED, WE'VE TIME, THEY'LL WAIT, HE'D GO, YOU'RE NEXT. It'S mIxEd, We'Re DonE.",
        "A naïve café-owner's résumé; Smörgåsbord & Zürich, façade, coöperate, Œuvre, æther, Łódź, señor, İstanbul.",
        "rock'n'roll, o'clock, 'tis, 'twas, dogs' tails, l'heure, d'accord, 's 't 're 've 'm 'll 'd ''s '' 'x",
        "",
        "a",
        " ",
        ".",
        "Hello, world!",
        " Hello, world! ",
    ),
    "languages": (
        "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.",
        "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.",
        "此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去，而借“通灵”之说，撰此《石头记》一书也。",
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。カタカナ、ﾊﾝｶｸ、１２３４５。",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ㄱㄴㄷ ㅏㅑㅓ 가각간",
        "حُكي والله أعلم أنه كان فيما مضى من قديم الزمان ملكٌ من ملوك ساسان. ١٢٣٤٥٦٧٨٩٠، ؟",
        "בראשית היתה הארץ תוהו ובוהו; שָׁלוֹם, עולם!",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। १२३४",
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน ๑๒๓๔ กำลัง",
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. ΆΈΉΊΌΎΏ ς σ",
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng. Đường, ước, ẵ ễ ỡ ự",
        "ყველა ადამიანი იბადება თავისუფალი. Բոլոր մարդիկ ծնվում են ազատ: ཨོཾ་མ་ཎི་ပဒ္မေ ហ៊ុំ កាន់តែ ⵣⴰⵎ ᏣᎳᎩ ꦲꦏ",
        "ﬁne ﬂow ﬀ Ⅷ ℌ K Å Ω ½ ¾ ² ³ ¹ ⅓ ㎏ ＡＢＣ ａｂｃ ！＂＃ ｡｢｣ ǅ ǆ ŉ",
    ),
    "numbers": (
        "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890123456789012345678901234567890",
        "3.14159, -2.71828e+10, 1,000,000.00, 0x7FFF_FFFF, 0b1010, 1e-9, 50%, $9.99, €12,50, 10^6, 7/8, 1st 2nd 3rd",
        "2024-02-29T23:59:59.999Z 12:34 +49 (0)30 123456 192.168.0.1 fe80::1ff:fe23:4567:890a v1.2.3-rc4 a1b2c3 4ever",
        "x1 x12 x123 x1234 1x 12x 123x ١٢٣ १२३ １２３ ①②③ ⅣⅤ 一二三 1234567abc8901234",
        " 1  22   333    4444\t5\t66\n777\n\n8888 ",
    ),
    "code": (
        "def f(x: int = 0) -> list[str]:\n    if not x:\n        return []  # nothing\n\n    return [f'{i!r}' for i in range(x)]\n",
        "#include <stdio.h>\r\nint main(void)\r\n{\r\n\tprintf(\"%d\\n\", 1 << 3);\r\n\treturn 0; /* ok */\r\n}\r\n",
        "const o = {a: 1, 'b-c': [true, null]}; fn?.(x => x ?? y) && z!==w || `${t}\\u00e9`; // 1+1\n\n\nexport default o;",
        "SELECT a.*, COUNT(1) FROM t AS a LEFT JOIN u ON a.id=u.id WHERE u.x IS NULL AND a.y<>'O''Brien' GROUP BY 1;--",
        "<!DOCTYPE html><p class=\"x y\">&nbsp;&lt;tag/&gt;</p><!-- c --><br/>\n<script>a<b&&c>d</script>",
        "for i in *.txt; do echo \"$i\" | sed -e 's/[^a-z]//g' >> /tmp/out 2>&1; done && exit $?",
        "camelCase PascalCase snake_case SCREAMING_CASE kebab-case XMLHttpRequest iPhone eBay McDonald getHTTPSUrl2Path",
        "https://example.org/a/b_c-d.html?q=1&r=%20x#frag user.name+tag@mail.example.com C:\\dir\\file.txt ../../up/~",
        "\\frac{1}{2}\\sum_{i=0}^{n} x_i^2 \\leq \\alpha \\cdot \\|\\mathbf{v}\\|_2 \\\\",
        "{\"k\":[1,2.5,-3e4],\"s\":\"\\\"q\\\" \\n\",\"u\":\"\\u4e2d\"}",
        "======== -------- ******** ________ ######## ........ !!!!???? ++-- <<>> ::== |> <| -> => ... /// ``` ''' \"\"\"",
        "a=b;c==d;e!=f;g+=h;i--;j**k;l//m;n@o;p:=q;r|s;t&u;v^w;~x;!y;z%2;(((a)));[[b]];{{c}};<d>;'e';\"f\";`g`",
    ),
    "spaces": (
        "  ", "   ", "    ", "     ", "        ", " " * 17, " " * 70, "\t", "\t\t", "\t\t\t\t\t", "\n", "\n\n", "\n\n\n",
        "\n\n\n\n\n", "\r\n", "\r\n\r\n", "\r", "\n \n", " \n", "\n ", "\n  x", "  \n  ", "\t\n\t", " \t \n \t ", "\v\f",
        "a b  c   d    e     f", " a", "  a", "   a", "a ", "a  ", "a   ", "\ta", "a\t", "\na", "a\n", "a\n\n", "\n\na",
        "x\n\n\ny\n \n z\n\t\n\tw", "line one  \nline two\\\n    indented\n\tTabbed\n\n\n    end  ", "1 \n2  \n 3",
        "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\u200bh\ufeffi\u202fj\u1680k", "\u3000\u3000x", "\u00a0 \u00a0",
        "x \u2009\u2009 y", "\n\u00a0\n",
    ),
    "symbols": (
        "😀 😃😄 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ©®™ ☃︎ ☃️ 🦙.cpp 🤷🏿‍♀️text🤖",
        "🚀 (normal) 😶‍🌫️ (joined) ✅ 🧑🏻‍💻🧑🏻‍💻🧑🏻‍💻 ❤️❤️❤️",
        "→ ⇒ ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑∏∫√∞≠≤≥±×÷ °C µm ′″ ‰ ½ ♠♥♦♣ ♩♪♫ ✓✗ ⚠️ ░▒▓█ ┌─┬┐",
        "«guillemets» „low“ ‚single‘ ‹angle› 「かぎ」『二重』【隅】（全角）〈山〉、。！？・…‥—―～",
        "• bullet · middot … ellipsis – en — em ‑ nb-hyphen ‐ hyphen \u00ad soft § ¶ † ‡ № ¿ ¡ ¢ £ ¥ € ₹ ₿ ¤",
    ),
    "unicode": (
        "e\u0301 n\u0303 a\u030a o\u0308\u0304 q\u0323\u0307 \u0301x Z\u0351\u036b\u0343a\u0321l\u0334g\u0322o\u0335",
        "é vs e\u0301; Å vs A\u030a vs \u212b; 가 vs \u1100\u1161; ﬁ; ſ; ẞß; ıİiI",
        "\u0915\u094d\u0937\u093f \u0e01\u0e33 \u0628\u0651\u064e\u0627 \u05e9\u05b8\u05c1 \U0001d552\U0001d553 \U00010330\U00010331",
        "\ufffd \ufffd\ufffd \ue000\uf8ff \U000f0000 \U0010fffd \ufdd0 \uffff \u2060\u2061 \u061c \u202atext\u202c",
        "\x01\x02\x1b[0m\x7f\x80\x9f \x08x\x0e",
        "\u2581x \u2581\u2581 a\u2581b", "Ġhello Ċ ĉ Ńx", "<0x41><0x0A> <0xFF>", "a\u034fb\u200dc\u200cd\ufe0fe\U000e0100f",
        "漢字𠮷野家𩸽 㐀㐁 豈更 ⺀⼀ 〇〡 ㈱㊀ ･ｦ ᄀ ힰ ꥠ ຀ ໑ ၀",
    ),
    "repeats": (
        "a" * 100, "ab" * 60, "!" * 100, "0" * 100, "é" * 50, "漢" * 50, "🦙" * 20, "-" * 129, "\n" * 40, " a" * 60,
        "the the the the the the the the", "<" * 30 + ">" * 30, "'" * 20, "\"\"\"\"''''", "=" * 7 + " " * 7 + "\n" * 7,
    ),
    "control": (
        "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n", "[INST] x [/INST]", "<<SYS>>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "<start_of_turn>user\nHi<end_of_turn>\n",
        "<｜User｜>Hi<｜Assistant｜>", "<think>hm</think>", "<tool_call>\n{}\n</tool_call>", "<|fim_prefix|>a<|fim_suffix|>b",
        "[CLS] [SEP] [MASK] [PAD]", "< s >", "<|", "|>", "<|im_", "_end|>", "<bos><eos>", "▁<PRE> <EOT> <|end|>",
    ),
}  # fmt: skip


def texts(added: Iterable[str] = ()) -> Iterator[str]:
    """All texts, then some made of a tokenizer's own added tokens: alone, in words, among spaces, twice in a row."""
    for group in TEXTS.values():
        yield from group
    tokens = list(added)
    chosen = tokens[:24] + tokens[24 :: max(1, len(tokens) // 24)]
    for token in dict.fromkeys(chosen):
        yield token
        yield f"word{token}word"
        yield f"Say {token} and  {token}{token}\n {token}\n\n\t{token} ."
    if len(chosen) > 1:
        yield "".join(chosen)
        yield " ".join(chosen)


def added_texts(data: Mapping[str, object]) -> list[str]:
    """The added tokens of a tokenizer.json, for `texts`."""
    added = data.get("added_tokens")
    return [t["content"] for t in added] if isinstance(added, list) else []
