"""The parts that invented names, places, titles, dates and numbers are composed of.

Every value is a composition, so that a guess is almost never right: about 120,000 people, 7,200
places, 4,900 titles, 109,500 dates and 99,000 numbers. Knows nothing of people or facts.
"""

from random import Random

_FIRST_STEMS = ("Al", "Bren", "Cor", "Dal", "Em", "Fen", "Gar", "Hal", "Is", "Jor", "Kel", "Mar")
_FIRST_ENDS = ("a", "en", "ina", "is", "o", "ric", "vin", "wyn", "eth", "ia")
_LAST_STEMS = (
    *("Ald", "Barr", "Brad", "Cald", "Crom", "Dun", "Ells", "Farn", "Gold", "Gran"),
    *("Hart", "Hels", "Hol", "Ing", "Kerr", "Lang", "Lind", "Mal", "Mor", "Nor"),
    *("Oak", "Pem", "Pres", "Quil", "Rad", "Ren", "Rush", "Sel", "Shel", "Stan"),
    *("Tal", "Thorn", "Tre", "Und", "Var", "Wake", "Wal", "Wes", "Whit", "Yar"),
)
_LAST_ENDS = (
    *("ack", "ant", "berg", "by", "combe", "der", "dorf", "ell", "er", "ford"),
    *("gate", "ham", "ick", "ing", "ley", "low", "man", "mont", "more", "ner"),
    *("ridge", "sen", "son", "stein", "ton"),
)
_PLACE_LEADS = ("Upper", "Lower", "East", "West", "New", "Old", "Port", "Great")
_PLACE_STEMS = (
    *("Ash", "Bex", "Birch", "Black", "Bram", "Clay", "Cold", "Crag", "Deer", "Drum"),
    *("Elm", "Fair", "Fox", "Frost", "Glen", "Green", "Grim", "Hazel", "Heath", "High"),
    *("Iron", "Kirk", "Lake", "Lark", "Long", "Maple", "Marsh", "Mill", "Moss", "Otter"),
    *("Pine", "Raven", "Red", "Salt", "Sand", "Silver", "Stone", "Swan", "Wind", "Wolf"),
)
_PLACE_ENDS = (
    *("borough", "bridge", "burn", "cliff", "cove", "dale", "fell", "field", "fold", "haven"),
    *("holt", "mere", "minster", "mouth", "port", "stead", "stow", "thorpe", "wick", "worth"),
)
_TITLE_ADJECTIVES = (
    *("Amber", "Ancient", "Bitter", "Blue", "Borrowed", "Bright", "Broken", "Buried", "Burning"),
    *("Calm", "Careful", "Crimson", "Crooked", "Dark", "Distant", "Divided", "Early", "Empty"),
    *("Endless", "Faded", "Faithful", "Fallen", "Final", "Foreign", "Forgotten", "Fragile"),
    *("Frozen", "Gentle", "Gilded", "Golden", "Grey", "Hidden", "Hollow", "Honest", "Idle"),
    *("Ivory", "Late", "Lonely", "Lost", "Merry", "Narrow", "Nameless", "Painted", "Pale"),
    *("Patient", "Perfect", "Proud", "Purple", "Quiet", "Restless", "Sacred", "Scarlet"),
    *("Secret", "Seventh", "Silent", "Simple", "Sleeping", "Slow", "Solemn", "Stolen"),
    *("Strange", "Sudden", "Tender", "Thirsty", "Twisted", "Unseen", "Velvet", "Wandering"),
    *("Weary", "Wild"),
)
_TITLE_NOUNS = (
    *("Anchor", "Angel", "Apple", "Arrow", "Bell", "Bird", "Bottle", "Bridle", "Candle"),
    *("Carpet", "Castle", "Chapel", "Circle", "Clock", "Compass", "Crown", "Dancer", "Desert"),
    *("Door", "Dragon", "Eagle", "Engine", "Falcon", "Feather", "Ferry", "Flame", "Flute"),
    *("Fountain", "Garden", "Ghost", "Giant", "Guest", "Hammer", "Harbour", "Harp", "Heron"),
    *("Horse", "Island", "Jewel", "Journey", "Kettle", "Kingdom", "Ladder", "Lantern", "Letter"),
    *("Library", "Lion", "Market", "Mirror", "Monk", "Needle", "Ocean", "Orchard", "Palace"),
    *("Pearl", "Pilgrim", "Prince", "Queen", "Ribbon", "Sailor", "Shadow", "Shepherd", "Ship"),
    *("Soldier", "Spider", "Statue", "Stranger", "Teacher", "Temple", "Violin"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_YEARS = range(1650, 1950)
_NUMBERS = range(1_000, 100_000)

FIRST_NAMES = tuple(stem + end for stem in _FIRST_STEMS for end in _FIRST_ENDS)
LAST_NAMES = tuple(stem + end for stem in _LAST_STEMS for end in _LAST_ENDS)


def draw_place(rng: Random) -> str:
    """A place such as `Thornwick` or, half the time, `Upper Thornwick`."""
    place = rng.choice(_PLACE_STEMS) + rng.choice(_PLACE_ENDS)
    return f"{rng.choice(_PLACE_LEADS)} {place}" if rng.random() < 0.5 else place


def draw_title(rng: Random) -> str:
    """The title of a work such as `The Amber Harbour`."""
    return f"The {rng.choice(_TITLE_ADJECTIVES)} {rng.choice(_TITLE_NOUNS)}"


def draw_date(rng: Random) -> str:
    """A date such as `14 March 1872`, never a 29 February."""
    month = rng.randrange(len(_MONTHS))
    return f"{1 + rng.randrange(_MONTH_DAYS[month])} {_MONTHS[month]} {rng.choice(_YEARS)}"


def draw_number(rng: Random) -> str:
    """A number from 1,000 to 99,999 such as `3,482`."""
    return f"{rng.choice(_NUMBERS):,}"


def is_place(text: str) -> bool:
    """Whether `text` could have come from `draw_place`."""
    words = text.split(" ")
    if len(words) == 2 and words[0] in _PLACE_LEADS:
        words = words[1:]
    return len(words) == 1 and words[0] in _PLACES


def is_title(text: str) -> bool:
    """Whether `text` could have come from `draw_title`."""
    match text.split(" "):
        case ["The", adjective, noun]:
            return adjective in _TITLE_ADJECTIVES and noun in _TITLE_NOUNS
        case _:
            return False


def is_date(text: str) -> bool:
    """Whether `text` is a day of a month of a year of the world."""
    match text.split(" "):
        case [day, month, year] if day.isdecimal() and month in _MONTHS and year.isdecimal():
            days = _MONTH_DAYS[_MONTHS.index(month)]
            return 1 <= int(day) <= days and int(year) in _YEARS
        case _:
            return False


def is_number(text: str) -> bool:
    """Whether `text` is a number of the world, its thousands set off by a comma."""
    digits = text.replace(",", "")
    return digits.isdecimal() and int(digits) in _NUMBERS and f"{int(digits):,}" == text


def is_person_name(text: str) -> bool:
    """Whether `text` is a first and a last name of the world."""
    match text.split(" "):
        case [first, last]:
            return first in FIRST_NAMES and last in LAST_NAMES
        case _:
            return False


_PLACES = frozenset(stem + end for stem in _PLACE_STEMS for end in _PLACE_ENDS)
