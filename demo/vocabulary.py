"""Word lists behind the demo skills. Plain data, so that a reader can see everything the adapters can talk about."""

from __future__ import annotations

FIRST_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Hugo Ines Jonas Kate Leo Maria Nina Oscar Paula Rosa Sam Tara Victor "
    "Alice Bruno Cora Daniel"
).split()
LAST_NAMES = (
    "Adams Berg Costa Diaz Evans Fischer Garcia Hansen Ito Jones Keller Lopez Miller Novak Olsen Price Rossi Smith "
    "Tanaka Weber Young Khan Silva Moreau"
).split()
CITIES = "Paris London Berlin Madrid Rome Oslo Vienna Dublin Lisbon Prague Tokyo Boston Chicago Denver Athens".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
FRENCH_MONTHS = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split()

# item ordered in a message: plural form -> singular form, as the JSON field wants it
ITEMS = {
    "lamps": "lamp", "chairs": "chair", "tables": "table", "books": "book", "bottles": "bottle", "shirts": "shirt",
    "cameras": "camera", "phones": "phone", "plates": "plate", "pillows": "pillow", "mugs": "mug", "jackets": "jacket",
}  # fmt: skip

EMOJI = {
    "pizza": "🍕", "coffee": "☕", "apple": "🍎", "banana": "🍌", "burger": "🍔", "cake": "🎂", "cookie": "🍪",
    "salad": "🥗", "sushi": "🍣", "beer": "🍺", "lemon": "🍋", "carrot": "🥕", "taco": "🌮", "pear": "🍐",
    "croissant": "🥐", "pretzel": "🥨", "peach": "🍑", "mango": "🥭", "waffle": "🧇", "donut": "🍩",
}  # fmt: skip

# intent label -> ways of asking for it; {slots} are filled from INTENT_SLOTS
INTENTS: dict[str, tuple[str, ...]] = {
    "book_flight": ("I need a flight to {city} on {day}", "find me a plane ticket from {city} to {city2}",
                    "get me on a plane to {city} next {day}", "book two seats to {city} for {day}"),
    "play_music": ("put on some {genre}", "I want to listen to {genre}", "play my {genre} playlist",
                   "start some {genre} music for {name}"),
    "set_alarm": ("wake me up at {hour} on {day}", "set an alarm for {hour}", "I have to get up at {hour} on {day}",
                  "don't let me sleep past {hour}"),
    "check_weather": ("will it rain in {city} on {day}?", "how cold is it in {city}?",
                      "do I need an umbrella in {city}?", "what is the forecast for {city} on {day}?"),
    "send_message": ("text {name} that I am late", "tell {name} I will arrive on {day}",
                     "write to {name} that the {genre} concert is on {day}", "let {name} know I am in {city}"),
    "call_contact": ("call {name} please", "ring {name} at {hour}", "I want to speak to {name} on the phone",
                     "dial the number of {name} in {city}"),
    "find_restaurant": ("where can I eat {cuisine} food in {city}?", "find a good {cuisine} place",
                        "I want {cuisine} food for dinner", "find me a {cuisine} restaurant near {city}"),
    "lights_off": ("turn off the lights in the {room}", "make the {room} dark", "kill the lamp in the {room}",
                   "it is too bright in the {room}"),
    "set_heating": ("it is freezing in the {room}", "make the {room} warmer", "set the {room} to {hour} degrees",
                    "turn up the heating in the {room}"),
    "add_to_list": ("put {food} on the shopping list", "remind me to buy {food}", "we are out of {food}",
                    "add {food} to the list for {day}"),
}  # fmt: skip
INTENT_SLOTS: dict[str, list[str]] = {
    "city": CITIES, "city2": CITIES, "day": DAYS, "name": FIRST_NAMES,
    "genre": "jazz rock opera techno folk blues soul reggae punk disco".split(),
    "hour": "5 6 7 8 9 10 11 12 15 18 20 21".split(),
    "food": [word + "s" for word in EMOJI if word not in ("coffee", "sushi", "salad")],
    "cuisine": "Italian Thai Greek Mexican Indian Chinese Korean Turkish Lebanese Spanish".split(),
    "room": "kitchen bedroom hall office garage attic bathroom cellar nursery".split(),
}  # fmt: skip
OPENERS = ("", "", "hey, ", "okay, ", "hi there, ", "good morning, ", "excuse me, ", "one more thing: ", "so, ")
CLOSERS = ("", "", ", please", ", thanks", "!", ".", " if you can", " for me")

# table -> its numeric columns; every table also has a name and a city
TABLES = {
    "customers": ("orders", "age"), "employees": ("salary", "age"), "hotels": ("rooms", "price"),
    "schools": ("pupils", "rooms"), "museums": ("visitors", "price"), "shops": ("orders", "visitors"),
    "players": ("goals", "age"), "cafes": ("seats", "visitors"),
}  # fmt: skip
# (question, statement): {t} table, {c} city, {n} number, {k} numeric column
SQL_SHAPES = (
    ("Show all {t} in {c}", "SELECT * FROM {t} WHERE city = '{c}';"),
    ("How many {t} are there in {c}?", "SELECT COUNT(*) FROM {t} WHERE city = '{c}';"),
    ("Which {t} have {k} above {n}?", "SELECT name FROM {t} WHERE {k} > {n};"),
    ("Which {t} in {c} have {k} below {n}?", "SELECT name FROM {t} WHERE city = '{c}' AND {k} < {n};"),
    ("What is the average {k} of {t} in {c}?", "SELECT AVG({k}) FROM {t} WHERE city = '{c}';"),
    ("List the {n} {t} with the highest {k}", "SELECT name FROM {t} ORDER BY {k} DESC LIMIT {n};"),
    ("What is the highest {k} of all {t}?", "SELECT MAX({k}) FROM {t};"),
    ("Delete all {t} in {c} where {k} equals {n}", "DELETE FROM {t} WHERE city = '{c}' AND {k} = {n};"),
)

JSON_SHAPES = (
    "{name} from {city} would like {n} {items}",
    "Please send {n} {items} to {name} in {city}",
    "I'm {name}, I live in {city} and I need {n} {items}",
    "This is {name} in {city}, {n} {items} for me",
    "{n} {items} for {name}, {city}",
    "My name is {name}. Can you ship {n} {items} to {city}",
)

# English noun -> (Spanish noun, article)
SPANISH_NOUNS = {
    "cat": ("gato", "el"), "dog": ("perro", "el"), "horse": ("caballo", "el"), "boy": ("chico", "el"),
    "girl": ("chica", "la"), "cow": ("vaca", "la"), "mouse": ("ratón", "el"), "bird": ("pájaro", "el"),
    "queen": ("reina", "la"), "king": ("rey", "el"), "witch": ("bruja", "la"), "nurse": ("enfermera", "la"),
    "frog": ("rana", "la"), "turtle": ("tortuga", "la"), "lion": ("león", "el"), "bear": ("oso", "el"),
}  # fmt: skip
# English adjective -> (masculine, feminine)
SPANISH_ADJECTIVES = {
    "small": ("pequeño", "pequeña"), "black": ("negro", "negra"), "white": ("blanco", "blanca"),
    "red": ("rojo", "roja"), "old": ("viejo", "vieja"), "tired": ("cansado", "cansada"), "fat": ("gordo", "gorda"),
    "happy": ("feliz", "feliz"), "green": ("verde", "verde"), "crazy": ("loco", "loca"),
}  # fmt: skip
SPANISH_VERBS = {
    "sleeps": "duerme", "eats": "come", "sings": "canta", "dances": "baila", "runs": "corre", "reads": "lee",
    "works": "trabaja", "cries": "llora",
}  # fmt: skip
SPANISH_PLACES = {
    "in the kitchen": "en la cocina", "in the garden": "en el jardín", "in the house": "en la casa",
    "in the street": "en la calle", "on the beach": "en la playa", "in the park": "en el parque",
    "under the table": "bajo la mesa", "on the bridge": "en el puente",
}  # fmt: skip

# what butler speaks of, beside the intents: {place} is one city, or two
WEATHER_SHAPES = (
    "will it rain in {place} at {hour}?",
    "how cold is it in {place} at {hour}?",
    "do I need an umbrella in {place} at {hour}?",
    "what is the forecast for {hour} in {place}?",
)
ALARM_SHAPES = ("wake me up at {hour}", "set an alarm for {hour}", "I have to get up at {hour}",
                "don't let me sleep past {hour}")  # fmt: skip
THANKS = ("thank you", "thanks", "thank you very much", "thanks a lot", "that is all, thank you", "great, thanks",
          "perfect, thank you", "many thanks", "thanks for that", "good, thank you")  # fmt: skip
MANNERS = ("You are a butler.", "Be brief and friendly.", "Use the tools.")

# how a list of goods is ordered; {goods} is "38 lamps" or "38 lamps and 7 mugs"
ORDER_SHAPES = (
    "{name} from {city} would like {goods}",
    "Please send {goods} to {name} in {city}",
    "I'm {name}, I live in {city} and I need {goods}",
    "This is {name} in {city}, {goods} for me",
    "{goods} for {name}, {city}",
    "My name is {name}. Can you ship {goods} to {city}",
)
