"""A thousand texts that people and files contain: real prompts, and random mixes of scripts, marks and spaces."""

from __future__ import annotations

import random

PROMPTS = [
    "",
    " ",
    "a red apple on a blue background",
    "Anthropomorphic cat dressed as a fire fighter, cinematic photo, 8K",
    "a cat’s “blue” hat – it’s ‘new’ … isn’t it?",
    "salt &amp; pepper &lt;b&gt; &quot;x&quot; &#39; &nbsp; &amp;amp;",
    "ＡＰＰＬＥ１２３　ｐｉｅ！",
    "I'm sure they've said we'll see he'd gone, don't THEY'RE 'tis 'S 'Ve''s",
    "masterpiece, (best quality:1.2), ((red)) [blue] {green|white}, <lora:x:0.8> AND 50% off",
    "first line\nsecond\r\nthird\tfourth\x0bfifth\x85sixth\u2028last",
    "nul\x00 bell\x07 unit\x1f\x1c\x1d\x1e delete\x7f c1\x80\x9f",
    "café cafe\u0301 naïve Å\u030a A\u030a e\u0301\u0323 \u1100\u1161\u11a8 각",
    "İstanbul I ı i̇ ISPARTA",
    "ΣΊΣΥΦΟΣ ὈΔΥΣΣΕΎΣ ΌΧΙ",
    "STRASSE Straße STRAẞE ﬁsh ﬂy ﬀ ǅ ǈ ŉ",
    "一只红色的苹果在蓝色背景上，ｶﾀｶﾅ カタカナ ひらがな 한국어 ไทย हिन्दी",
    "مرحبا بالعالم שלום עולם",
    "🍎 on 🟦, 👩‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽 🇩🇪 ❤️",
    "f/1.8 35mm ISO-100 1920x1080 3,141.59 ½ ² ① Ⅳ ٣ ৩ 2nd 007",
    "word" * 200,
    "a " * 300,
    "a red apple, " * 60,
    "a <|endoftext|> b<|startoftext|>c <|ENDOFTEXT|> <|STARTOFTEXT|> <start_of_text> <end_of_text> </w> cat</w>",
    "zero\u200bwidth\u200djoiner\ufeffmark soft\u00adhyphen \u202ertl\u202c nb\u00a0sp thin\u2009sp \u3000",
    "Ã©tÃ© â€œmojibakeâ€\u009d Ã¼ber",
    "!!! ??? ... --- ___ *** ~~~ ^^^ ||| \\\\ // :) ;-) ¯\\_(ツ)_/¯",
    "𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝐛𝐨𝐥𝐝 𝒮 ℌ K Å \U0010ffff \ufffd",
]

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "äöüßéèêçñøåÆŒÐÞłŞİıĞ", "“”‘’«»„–—…·•™©®°", " \t\n\r\x0b\x0c\x85\u00a0\u2003\u3000", "\x00\x03\x04\x1c\x1f\x7f",
    "\u0300\u0301\u0308\u0327\u0323", "ΑΒΓΔΣσςάΐ", "АБВГабвгЁё", "红苹果蓝背景猫", "ｱｲｳＡＢａｂ１２！",
    "アイウえおガ\u3099", "한국가각ㄱ", "אבגןس\u0651ع", "กขิฃ", "कखि\u093c", "🍎🐱👍🏽👩\u200d❤\ufe0f🇩🇪",
    "½²①Ⅳ٣ﬁﬂǅŉⓐ", "\u200b\u200d\ufeff\u00ad\u2028",
)  # fmt: skip
_WORDS = (
    "a cat red Apple on blue background the of photo's don't we've I'll &amp; &lt; (cat:1.2) 's '' <|endoftext|> "
    "<|startoftext|> </w> \\( \\) 8k --- ... café"
).split()


def texts(count: int = 1000, seed: int = 0) -> list[str]:
    """Returns the prompts above and random texts, the same ones for a seed."""
    rng = random.Random(seed)
    found = list(PROMPTS)
    while len(found) < count:
        words = []
        for _ in range(rng.choice((1, 2, 5, 20))):
            letters = "".join(rng.sample(_ALPHABETS, rng.choice((1, 1, 2, 4))))
            word = "".join(rng.choice(letters) for _ in range(rng.randint(1, 12)))
            words.append(rng.choice((word, rng.choice(_WORDS))))
        found.append(rng.choice((" ", "", ", ")).join(words))
    return found
