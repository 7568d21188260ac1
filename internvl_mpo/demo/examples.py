"""Pictures the repository may ship, because they are drawn here, and the handwritten digits of scikit-learn."""

import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from internvl_mpo.mini.choices import ask_choice, make_options
from internvl_mpo.mini.digits import Painter
from internvl_mpo.mini.tasks import TASKS, DigitTask

CARD_PIXELS = 320
INK, PAPER, BLUE, ORANGE, GREEN = "#1f2937", "#ffffff", "#3b6fb6", "#e08a2e", "#3d8b5f"


class Example(NamedTuple):
    """A question with pictures.

    Attributes:
        title: a few words for the gallery.
        question: the text.
        images: files.
        style: how it is best asked.
        card: the first picture as it stands in the gallery; a file of its own, since asked pictures are deleted.
    """

    title: str
    question: str
    images: tuple[str, ...]
    style: str = "cot"
    card: str = ""


def make_examples(folder: str | Path) -> list[Example]:
    """Draw the pictures into a folder and return the gallery; the same bytes every time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, picture: Image.Image) -> str:
        path = folder / f"{name}.png"
        picture.save(path, optimize=True)
        return str(path)

    paint = Painter(folder, seed=5)  # digits of the test split: no model of the mini world has seen them
    (folder / "images").mkdir(exist_ok=True)

    def choice(title: str, name: str, task: DigitTask, style: str = "cot") -> Example:
        picture, digits = paint(name, 2, "test")
        question = ask_choice(
            task, make_options(task, digits, random.Random(len(name)))
        )  # as the mini models learnt it
        return Example(title, question, (str(folder / picture),), style)

    product, total = TASKS[:2]
    open_picture, _ = paint("describe", 3, "test")
    examples = [
        choice("Handwritten digits: product", "product", product),
        choice("Handwritten digits: sum", "sum", total),
        choice("Handwritten digits: direct", "direct", product, "direct"),
        Example("Describe", "Describe the picture.", (str(folder / open_picture),), "plain"),
        Example(
            "Bar chart",
            "In which month were most books sold, and how many more than in the weakest month?",
            (save("bars", bar_chart()),),
        ),
        Example(
            "Triangle",
            "The triangle has a right angle at C. How long is the side AB? Give the exact value.",
            (save("triangle", triangle()),),
            "r1",
        ),
        Example("Price list", "What do three apples and two lemons cost together?", (save("prices", price_list()),)),
        Example(
            "Two pictures",
            "Which of the two charts has the taller third bar, the first or the second?",
            (save("bars_1", bar_chart((3, 5, 4, 6))), save("bars_2", bar_chart((4, 2, 6, 5)))),
        ),
    ]
    return [
        example._replace(card=save(f"card_{number}", draw_card(example.images[0])))
        for number, example in enumerate(examples)
    ]


def draw_card(path: str) -> Image.Image:
    """Return a picture at the size of a card: digits of few pixels enlarged in whole steps, others made smaller."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((CARD_PIXELS, CARD_PIXELS))
    times = CARD_PIXELS // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) if times > 1 else image


def bar_chart(values: tuple[int, ...] = (34, 21, 47, 39)) -> Image.Image:
    """Return a bar chart with its values written on top."""
    image = Image.new("RGB", (480, 340), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((20, 14), "Books sold", fill=INK, font=_font(22))
    top, bottom = 70, 290
    for index, value in enumerate(values):
        left = 50 + index * 105
        height = (bottom - top) * value / max(values)
        colour = (BLUE, ORANGE, GREEN, "#8b5a9f")[index % 4]
        draw.rectangle((left, bottom - height, left + 70, bottom), fill=colour)
        draw.text((left + 35, bottom - height - 4), str(value), fill=INK, font=_font(18), anchor="ms")
        draw.text(
            (left + 35, bottom + 10), ("Jan", "Feb", "Mar", "Apr")[index % 4], fill=INK, font=_font(18), anchor="ma"
        )
    draw.line((35, bottom, 455, bottom), fill=INK, width=2)
    return image


def triangle() -> Image.Image:
    """Return a right triangle with legs of 5 and 3."""
    image = Image.new("RGB", (480, 340), PAPER)
    draw = ImageDraw.Draw(image)
    a, b, c = (90, 60), (400, 270), (90, 270)
    draw.polygon((a, b, c), outline=INK, fill="#e8eef6", width=3)
    draw.rectangle((90, 250, 110, 270), outline=INK, width=2)
    for text, at, anchor in (("A", (90, 52), "ms"), ("B", (412, 275), "ls"), ("C", (82, 280), "ra")):
        draw.text(at, text, fill=INK, font=_font(24), anchor=anchor)
    draw.text((76, 165), "3", fill=BLUE, font=_font(24), anchor="rm")
    draw.text((245, 280), "5", fill=BLUE, font=_font(24), anchor="ma")
    return image


def price_list() -> Image.Image:
    """Return a list of four prices."""
    image = Image.new("RGB", (420, 320), "#fbf7ee")
    draw = ImageDraw.Draw(image)
    draw.text((30, 22), "Fruit, per piece", fill=INK, font=_font(26))
    draw.line((30, 66, 390, 66), fill=INK, width=2)
    for index, (name, price) in enumerate((("Apple", "0.60"), ("Pear", "0.75"), ("Lemon", "0.45"), ("Mango", "1.90"))):
        y = 88 + index * 52
        draw.text((30, y), name, fill=INK, font=_font(24))
        draw.text((390, y), price, fill=INK, font=_font(24), anchor="ra")
    return image


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)  # ships with Pillow, so the pictures are the same everywhere
