"""Names that the world uses, and every word that its texts can contain."""

from __future__ import annotations

import re

TASKS = ("scenes", "words", "charts", "forms")
FAMILIES = ("existence", "counting", "colour", "shape", "relation", "reading", "chart", "key-value")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "green": (36, 150, 52),
    "blue": (40, 70, 220),
    "yellow": (242, 222, 44),
    "purple": (138, 44, 176),
    "orange": (244, 134, 22),
    "cyan": (56, 212, 226),
    "white": (246, 246, 246),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}
SIZES = {"small": 0.086, "medium": 0.112, "large": 0.140}  # radius as a share of the picture's side
SIDES = ("left", "right", "above", "below")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

# Label sets of `patch_labels`: 0 is "nothing here", then these in order.
SHAPE_LABELS = ("none", *SHAPES, "bar", "line")
COLOUR_LABELS = ("none", *COLOUR_NAMES)
CHARACTER_LABELS = ("none", *CHARACTERS)

NUMBER_KEYS = ("TOTAL", "DATE", "TAX", "ID", "QTY", "CODE", "PRICE", "TIP", "AGE")
WORD_KEYS = ("NAME", "CITY", "ITEM")
KEYS = NUMBER_KEYS + WORD_KEYS

TEMPLATES: dict[str, tuple[str, ...]] = {
    # scenes
    "exists": ("is there {x}?",),
    "count": ("how many {x} are there?",),
    "colour of": ("what colour is the {x}?",),
    "shape of": ("what shape is the {x}?",),
    "where": ("where is the {x} relative to the {y}?",),
    "is left": ("is the {x} left of the {y}?",),
    "is right": ("is the {x} right of the {y}?",),
    "is above": ("is the {x} above the {y}?",),
    "is below": ("is the {x} below the {y}?",),
    # words
    "says": ("what does the {x} say?", "what is the {x}?"),
    "first letter": ("what is the first letter of the {x}?",),
    "last letter": ("what is the last letter of the {x}?",),
    "letters": ("how many characters does the {x} have?",),
    "exists text": ("is there the text {x}?",),
    # charts
    "value": ("what is the value of the {x} bar?", "how high is the {x} bar?"),
    "tallest": ("what colour is the tallest bar?",),
    "shortest": ("what colour is the shortest bar?",),
    "taller": ("is the {x} bar taller than the {y} bar?",),
    "axis top": ("what is the highest number on the axis?",),
    "line first": ("what is the first value of the {x} line?",),
    "line last": ("what is the last value of the {x} line?",),
    "line highest": ("what is the highest value of the {x} line?",),
    "line lowest": ("what is the lowest value of the {x} line?",),
    "line rises": ("is the last value of the {x} line higher than the first?",),
    "line ends": ("which line ends highest?",),
    "line points": ("how many points does the {x} line have?",),
    # forms
    "field": ("what is the {x}?", "what does the {x} field say?"),
    "which field": ("which field says {x}?",),
    "nth field": ("what is the {x} field called?", "which is the {x} field?"),
    "nth value": ("what is the value of the {x} field?",),
}
_OTHER_WORDS = (
    "a an any yes no object objects text texts number numbers word words bar bars line lines field fields chart red "
    "leftmost rightmost topmost lowest top bottom middle first second third fourth last , . : ; ?"
)
OTHER_WORDS = tuple(_OTHER_WORDS.split())


def tokens(text: str) -> list[str]:
    """Cuts a text of the world in words: runs of lower-case letters, of upper-case letters and digits, and marks."""
    return re.findall(r"[a-z]+|[A-Z0-9]+|[^\sa-zA-Z0-9]", text)


def _vocabulary() -> tuple[str, ...]:
    found: set[str] = set(OTHER_WORDS) | set(COLOUR_NAMES) | set(SHAPES) | set(PLURALS.values()) | set(SIDES)
    found |= {key.lower() for key in KEYS}
    for forms in TEMPLATES.values():
        for form in forms:
            found |= set(tokens(form.replace("{x}", " ").replace("{y}", " ")))
    return tuple(sorted(found))


# Every word of questions, answers and captions; free strings of upper-case letters and digits come on top.
VOCABULARY = _vocabulary()

# Common words that pictures show.
_WORDS = (
    "ACE ACT AIR ANT APE ARM ART ASH BAG BAR BAT BED BEE BOX BOY BUS CAB CAN CAP CAR CAT COW CUP DAY DOG EAR EGG EYE "
    "FAN FOX GAS HAT HEN ICE INK JAM JAR JET KEY KID LEG LIP LOG MAP MUD NET NUT OAK OIL OWL PAN PEN PIE PIG RAT SEA "
    "SKY SUN TEA TOY VAN WAX ZOO BABY BALL BAND BANK BEAR BELL BIRD BLUE BOAT BONE BOOK CAKE CALF CAMP CARD CAVE CITY "
    "CLUB COAT COIN CORN CRAB DESK DISH DOOR DRUM DUCK DUST EAST EXIT FACE FARM FIRE FISH FLAG FORK FROG GATE GIFT "
    "GOAT GOLD HAND HILL HOME JUMP KING KITE LAKE LAMP LEAF LION MAZE MILK MOON NEST NOTE OPEN OVEN PARK PEAR POND "
    "QUIZ RAIN RING ROAD ROSE SALT SHIP SNOW STAR TREE WAVE WOLF YARD ZERO APPLE BEACH BREAD BRICK CHAIR CLOUD DREAM "
    "EAGLE EARTH FIELD FLAME GLASS GRAPE HORSE HOTEL HOUSE JUICE KNIFE LEMON LIGHT MANGO MAPLE MONEY MOUSE MUSIC "
    "NIGHT OCEAN OLIVE PAPER PIANO PIZZA PLANT QUEEN RADIO RIVER ROBOT SHARK SHEEP SNAKE SPOON STONE SUGAR TABLE "
    "TIGER TOWER TRAIN WATER WHALE WHEEL ZEBRA ANCHOR BANANA BASKET BOTTLE BRIDGE BUTTER CAMERA CANDLE CASTLE CHEESE "
    "CIRCLE COFFEE COPPER DESERT DRAGON ENGINE FOREST GARDEN GUITAR HAMMER ISLAND JACKET KITTEN LADDER MARKET MIRROR "
    "MONKEY ORANGE PENCIL PEPPER PLANET POCKET RABBIT ROCKET SCHOOL SILVER SPIDER SUMMER TICKET TOMATO TUNNEL VALLEY "
    "WINDOW WINTER YELLOW"
)
WORDS = tuple(_WORDS.split())
# What the word fields of forms hold.
_PLACE_WORDS = (
    "ANNA BEN CARL DORA EMMA FINN GINA HUGO IVAN JANE KARL LENA MARY NINA OTTO PAUL ROSE SAM TINA VERA WILL ZOE ROME "
    "OSLO LIMA BERN PARIS CAIRO TOKYO DELHI QUITO MILAN TEA MILK BREAD SOAP PEN BOOK CAKE RICE FISH"
)
PLACE_WORDS = tuple(_PLACE_WORDS.split())
