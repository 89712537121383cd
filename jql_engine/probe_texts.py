"""Texts in many languages, and odd ones, on which a fast tokenizer meets its oracle."""

from __future__ import annotations

from itertools import cycle, islice

SENTENCES = (
    "Water boils at a lower temperature on a mountain, because less air presses down on its surface.",
    "Wer abends die Sterne zählt, merkt bald, dass manche von ihnen gar keine Sterne sind, sondern Planeten.",
    "La boulangerie du coin n'ouvre qu'à sept heures, mais l'odeur du pain réveille toute la rue bien avant.",
    "El río crece cada primavera cuando la nieve de la sierra empieza a derretirse; los campos lo agradecen.",
    "La somma degli angoli interni di un triangolo è sempre di 180°, qualunque sia la lunghezza dei lati.",
    "Quem planta uma árvore pensa em pessoas que ainda não nasceram, diz o velho jardineiro da praça.",
    "W każdej bibliotece jest książka, której nikt nie otworzył od czterdziestu lat – i ktoś jej właśnie szuka.",
    "Свет далёкой звезды идёт к нам тысячи лет, поэтому мы видим её такой, какой она была давно.",
    "Світло йде від далекої зорі тисячі років, тож ми бачимо її минуле.",
    "Denizin tuzu nehirlerden gelir: yağmur kayaları çözer, akarsular taşır, güneş suyu buharlaştırır.",
    "Το νερό διαστέλλεται όταν παγώνει, γι' αυτό ο πάγος επιπλέει.",
    "تدور الأرض حول الشمس في سنة واحدة، ويدور القمر حول الأرض في شهر تقريبًا.",
    "המים קופאים באפס מעלות, אבל מי ים קופאים רק בטמפרטורה נמוכה יותר.",
    "पेड़ अपनी पत्तियों से धूप पकड़ते हैं और उसी से अपना भोजन बनाते हैं।",
    "গাছের পাতা সূর্যের আলো থেকে খাদ্য তৈরি করে।",
    "ต้นไม้ดูดน้ำจากดินผ่านรากแล้วส่งขึ้นไปยังใบเพื่อสร้างอาหาร",
    "月亮自己并不发光,我们看到的是它反射的太阳光,所以月相会随位置改变。",
    "地球的自轉造成晝夜交替,公轉則帶來四季。",
    "桜の花は毎年少しずつ早く咲くようになり、研究者は千年分の日記を調べている。",
    "물이 얼면 부피가 늘어나기 때문에 겨울에는 수도관이 터지기도 한다.",
    "Mặt trăng quay quanh Trái Đất và luôn hướng cùng một mặt về phía chúng ta.",
    "Maji huchemka haraka zaidi mlimani kwa sababu hewa ni nyepesi.",
    "def mean(values):\n\treturn sum(values) / len(values)  # fails for an empty list: ZeroDivisionError",
    "Home | About | Contact | Log in   © 2024 example.org   Cookies: [Accept all] [Reject]   » next page (2/17)",
)

# Texts on which tokenizers are known to differ from each other.
# fmt: off
ODDITIES = (
    "\x7f", "a\u2e4db", "\u0890", "\u07fd",
    "", " ", "   ", "\n", "\n\n", "\t", "\r\n\r\n", "\u00a0", "\u2003 \u2003", "\u200b", "\ufeff", "\u00ad", "\x00",
    "\x1f", "\u2581", "\u2581\u2581", " \u2581 ", "a", " a", "a ", "  a  b  ", "a\n\nb", "line one\r\nline two\r\n",
    "a\u00a0b", "a\u200bb", "<s>", "</s>", "<s> </s>", "<pad>", "<unk>", "text with </s> inside", "<mask>",
    " <mask> ", "<html><s>struck</s></html>", "é", "e\u0301", "\ufb01ne \ufb02ow", "ＡＢＣ　１２３", "①②③ ㎏ ㍿ ½", "ﷺ",
    "ｶﾞｷﾞｸﾞ", "Å Å Å", "ẛ̣", "한글", "한글", "😀", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "𝒜𝓁𝑔𝑒𝒷𝓇𝒶", "\U0001f9ff\U00020000", "z̷̢a̶l̵g̸o̷",
    "\u202eabc\u202c", "�", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!!!!!!!!??????????..........", "https://example.org/a/very/long/path?with=query&and=%C3%A9#fragment",
    "3.14159265358979323846", "1,000,000.00 €", "C:\\Users\\name\\file.txt",
    "{\"key\": [1, 2, {\"nested\": null}]}", "\\frac{a}{b} = \\sqrt{c^2}", "CamelCaseAndsnake_case",
)
# fmt: on


def texts() -> list[str]:
    """Texts for the tokenizer: every sentence, growing mixtures of them, and the oddities."""
    mixtures = ["\n".join(islice(cycle(SENTENCES), i, 3 * i + 2)) for i in range(len(SENTENCES))]
    glued = ["".join(SENTENCES[i:]) for i in range(0, len(SENTENCES), 5)]
    cut = [sentence[i:] for i, sentence in enumerate(SENTENCES)] + [s[: len(s) // 2] + " " for s in SENTENCES]
    return [*SENTENCES, *mixtures, *glued, *cut, *ODDITIES]
