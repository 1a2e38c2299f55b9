"""`glyphs`: letters of many scripts drawn from the fonts inside matplotlib. Font = writer, script = alphabet.

Fonts (matplotlib ships them): DejaVu Sans, Sans Mono and Serif in their styles, STIX General, and for the
letters A-Z a-z the Computer Modern text fonts, whose other code points hold something else. A letter is a
class when at least four fonts have it, Unicode calls it a letter of one of `SCRIPTS`, and no earlier letter
is drawn with the same pixels (Cyrillic and Greek capital A are Latin A in most fonts, and a class that cannot
be told apart is no class).

Each picture is one letter in one font under a small random rotation, shear, scaling, shift and elastic warp:
[size, size, 1] in [0, 1], ink 1.
"""

import unicodedata
from importlib import metadata
from pathlib import Path

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import nearest, require

# Name here -> how the Unicode names of its letters begin.
SCRIPTS = {
    "latin": "LATIN ",
    "greek": "GREEK ",
    "cyrillic": "CYRILLIC ",
    "canadian": "CANADIAN SYLLABICS ",
    "arabic": "ARABIC LETTER ",
    "armenian": "ARMENIAN ",
    "georgian": "GEORGIAN ",
    "hebrew": "HEBREW LETTER ",
    "lao": "LAO LETTER ",
    "lisu": "LISU LETTER ",
    "old_italic": "OLD ITALIC LETTER ",
}
STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
LATIN_ONLY = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
FONTS = tuple(family + style for family, styles in STYLES.items() for style in styles) + LATIN_ONLY
MIN_FONTS = 4
# Correlation of two pictures, blurred by 1.5 pixels, above which one is a copy of the other: Lisu capitals are turned
# Latin ones (0.951 and more), and of letters below it a reader can say what the difference is.
COPY = 0.95
OVERSAMPLING = 2  # letters are drawn once at twice the size, then warped down


def glyphs(
    *,
    size: int = 28,
    classes: int | None = 100,
    scripts: tuple[str, ...] | None = None,
    test_scripts: tuple[str, ...] = (),
    test_fonts: tuple[str, ...] = (),
    jitter: float = 1.0,
    train_size: int = 20000,
    test_size: int = 5000,
    seed: int = 0,
) -> Content:
    """Pictures [size, size, 1] of letters; label = letter.

    size: pixels, 16..64 (28 and 32 are usual). classes: so many letters drawn by `seed`, None for all of
    them. scripts: names in `SCRIPTS`, default all. test_scripts: scripts whose letters are in the test only,
    and then the test has
    no others: its classes are new (labels go on after the training classes). test_fonts: fonts (names in
    `FONTS`) that are in the test only, and then the test has no others. With neither, the test differs by its
    jitter.
    jitter: strength of the random changes; 1 turns by up to 10 degrees. Classes are equally frequent up to
    one.

    `info["letters"]` names the letter of each label, `info["train_classes"]` counts the labels below which
    training letters lie. Chance is 1 / (classes of the test).
    """
    scripts = tuple(SCRIPTS) if scripts is None else tuple(scripts)
    test_scripts, test_fonts = tuple(test_scripts), tuple(test_fonts)
    _check(size, classes, scripts, test_scripts, test_fonts, jitter, train_size, test_size)
    train_fonts = [font for font in FONTS if font not in test_fonts]
    everywhere = Letters(size)
    chosen = everywhere.choose(scripts, test_scripts, classes, train_fonts, test_fonts, seed)
    train_letters, test_letters = chosen
    count = len(train_letters)
    train = everywhere.draw(train_letters, train_fonts, train_size, jitter, np.random.default_rng([seed, 0]))
    test = everywhere.draw(test_letters, test_fonts or FONTS, test_size, jitter, np.random.default_rng([seed, 1]))
    letters = train_letters
    if test_scripts:
        test["labels"] = test["labels"] + np.int32(count)
        letters = train_letters + test_letters
    info = {
        "classes": len(letters),
        "train_classes": count,
        "chance": 1 / len(test_letters),
        "letters": "".join(letters),
        "writers": list(FONTS),
    }
    return Content(kind="image", train=train, test=test, info=info)


def facts() -> dict[str, str]:
    """The fonts are matplotlib's, the rasteriser is Pillow's."""
    return {name: metadata.version(name) for name in ("matplotlib", "pillow")}


def _check(size, classes, scripts, test_scripts, test_fonts, jitter, train_size, test_size) -> None:
    require(16 <= size <= 64, f"glyphs: size must be in 16..64, got {size}")
    require(classes is None or classes >= 2, f"glyphs: classes must be at least 2 or None, got {classes}")
    for script in (*scripts, *test_scripts):
        require(script in SCRIPTS, f"glyphs: unknown script {script!r}{nearest(script, SCRIPTS)}")
    for font in test_fonts:
        require(font in FONTS, f"glyphs: unknown font {font!r}{nearest(font, FONTS)}")
    require(set(scripts) - set(test_scripts), "glyphs: test_scripts leaves no script of `scripts` for training")
    require(
        jitter > 0 or test_scripts or test_fonts,
        "glyphs: with jitter=0 the test repeats training pictures; hold out test_fonts or test_scripts",
    )
    require(jitter >= 0, f"glyphs: jitter must not be negative, got {jitter}")
    require(train_size > 0 and test_size > 0, "glyphs: train_size and test_size must be above 0")


def letter_script(letter: str) -> str | None:
    """The name in `SCRIPTS` of a letter's script, None for anything else."""
    if unicodedata.category(letter) not in ("Lu", "Ll", "Lt", "Lo"):
        return None
    name = unicodedata.name(letter, "")
    return next((script for script, begin in SCRIPTS.items() if name.startswith(begin)), None)


class Letters:
    """The letters that the fonts have, and their pictures, drawn when first asked for."""

    def __init__(self, size: int):
        import matplotlib
        from matplotlib.ft2font import FT2Font

        self.size = size
        self.folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.fonts_of: dict[str, list[str]] = {}
        for font in FONTS:
            for code in sorted(FT2Font(str(self.folder / f"{font}.ttf")).get_charmap()):
                letter = chr(code)
                plain = letter.isascii() and letter.isalpha()
                if (plain or font not in LATIN_ONLY) and letter_script(letter):
                    self.fonts_of.setdefault(letter, []).append(font)
        self.pillow_fonts: dict[str, object] = {}
        self.pictures: dict[tuple[str, str], np.ndarray] = {}

    def choose(self, scripts, test_scripts, classes, train_fonts, test_fonts, seed):
        """Letters of the training and of the test classes; the same list unless scripts are held out."""
        known = self.classes()
        rng = np.random.default_rng([seed, 2])

        def pick(names, fonts, others=None):
            letters = [
                letter
                for letter in known
                if letter_script(letter) in names
                and set(self.fonts_of[letter]) & set(fonts)
                and (others is None or set(self.fonts_of[letter]) & set(others))
            ]
            limit = len(letters) if classes is None else classes
            require(limit <= len(letters), f"glyphs: {limit} classes wanted, {len(letters)} letters there")
            require(len(letters) > 0, f"glyphs: no letter of {', '.join(names)} in the fonts asked for")
            return sorted(rng.permutation(letters)[:limit].tolist())

        train_scripts = [name for name in scripts if name not in test_scripts]
        train = pick(train_scripts, train_fonts, test_fonts or None)
        if not test_scripts:
            return train, train
        of = lambda names: [letter for letter in known if letter_script(letter) in names]
        known = self.without_copies(of(test_scripts), of(train_scripts))
        return train, pick(test_scripts, test_fonts or FONTS)

    def classes(self) -> list[str]:
        """Letters that at least `MIN_FONTS` fonts have, without those that look like an earlier one."""
        seen: set[tuple[str, bytes]] = set()
        found = []
        for letter in sorted(self.fonts_of):
            if len(self.fonts_of[letter]) < MIN_FONTS:
                continue
            # Two fonts, the first and the last that have it, tell look-alikes; all twenty would take long.
            looks = {
                (font, self.picture(letter, font).tobytes())
                for font in (self.fonts_of[letter][0], self.fonts_of[letter][-1])
            }
            if not looks & seen and all(picture.strip(b"\0") for _, picture in looks):
                found.append(letter)
            seen |= looks
        return found

    def without_copies(self, letters: list[str], others: list[str]) -> list[str]:
        """The `letters` that in none of two fonts, turned by 0, 1, 2 or 3 quarters, are a copy of one of the others."""
        known: dict[str, np.ndarray | None] = {}

        def is_copy(letter: str, font: str) -> bool:
            if font not in known:
                drawn = [blurred(self.picture(other, font)) for other in others if font in self.fonts_of[other]]
                known[font] = np.stack(drawn) if drawn else None
            if known[font] is None:
                return False
            turned = [blurred(np.rot90(self.picture(letter, font), turns)) for turns in range(4)]
            return (known[font] @ np.stack(turned, 1)).max() > COPY

        ends = lambda letter: (self.fonts_of[letter][0], self.fonts_of[letter][-1])
        return [letter for letter in letters if not any(is_copy(letter, font) for font in ends(letter))]

    def picture(self, letter: str, font: str) -> np.ndarray:
        """uint8 [n, n], n = OVERSAMPLING * size: the letter with its ink centred, shrunk if it is wide."""
        from PIL import Image, ImageDraw, ImageFont

        if (letter, font) in self.pictures:
            return self.pictures[letter, font]
        side = OVERSAMPLING * self.size
        scale = 0.75
        while True:
            key = (font, scale)
            if key not in self.pillow_fonts:
                self.pillow_fonts[key] = ImageFont.truetype(
                    self.folder / f"{font}.ttf", round(scale * side), layout_engine=ImageFont.Layout.BASIC
                )
            pillow_font = self.pillow_fonts[key]
            left, top, right, bottom = pillow_font.getbbox(letter)
            if max(right - left, bottom - top) <= 0.85 * side:
                break
            scale *= 0.85
        image = Image.new("L", (side, side))
        corner = ((side - left - right) // 2, (side - top - bottom) // 2)
        ImageDraw.Draw(image).text(corner, letter, font=pillow_font, fill=255)
        self.pictures[letter, font] = np.asarray(image)
        return self.pictures[letter, font]

    def draw(self, letters: list[str], fonts, count: int, jitter: float, rng: np.random.Generator):
        """`count` pictures: letters in turn, each in one of the given fonts that have it."""
        inputs = np.empty((count, self.size, self.size, 1), np.uint8)
        labels = (np.arange(count) % len(letters)).astype(np.int32)
        writers = np.empty(count, np.int32)
        available = [[font for font in self.fonts_of[letter] if font in fonts] for letter in letters]
        for index, label in enumerate(labels):
            font = available[label][rng.integers(len(available[label]))]
            writers[index] = FONTS.index(font)
            inputs[index, ..., 0] = warp(self.picture(letters[label], font), self.size, jitter, rng)
        return {"inputs": inputs, "labels": labels, "writer": writers}


def blurred(picture: np.ndarray) -> np.ndarray:
    """float32 [n * n]: the picture, blurred, less its mean, of norm 1: products of such are correlations."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(picture.astype(np.float32), 1.5)
    smooth -= smooth.mean()
    return (smooth / max(np.linalg.norm(smooth), 1e-6)).ravel()


def warp(picture: np.ndarray, size: int, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, n] -> uint8 [size, size] under a random affine and elastic change of strength `jitter`.

    At jitter 1: rotation within 10 degrees, shear within 0.1, scale within 10 % an axis, shift within 6 % of
    the side, and a smooth displacement (a 4 x 4 grid of normal steps of 2 % of the side, interpolated
    linearly).
    """
    from scipy.ndimage import map_coordinates

    angle, shear = jitter * rng.uniform(-1, 1, 2) * (np.pi / 18, 0.1)
    stretch = 1 + 0.1 * jitter * rng.uniform(-1, 1, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) / stretch
    axis = (np.arange(size) + 0.5) / size - 0.5
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    knots = jitter * 0.02 * rng.standard_normal((2, 4, 4))
    spread = np.maximum(0, 1 - np.abs(np.linspace(0, 3, size)[:, None] - np.arange(4)))
    elastic = (spread @ knots @ spread.T).reshape(2, -1)
    where = matrix @ grid + elastic + 0.06 * jitter * rng.uniform(-1, 1, (2, 1))
    pixels = (where + 0.5) * len(picture) - 0.5
    warped = map_coordinates(picture.astype(np.float32), pixels, order=1, mode="constant", prefilter=False)
    return np.round(warped).astype(np.uint8).reshape(size, size)
