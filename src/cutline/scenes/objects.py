"""What is in the world: 96 objects in 8 families, 6 grounds and 4 skies, by name.

The true height of an object is the height in metres of its upright picture; the depth of a scene can only be known
through it (see `layout`). The order of `OBJECTS` is the order of the cells in `objects.webp` and of the class ids.
"""

from typing import NamedTuple


class Object(NamedTuple):
    """One kind of object.

    code: code point of the emoji; height: metres; colour: its main colour; de, es, fr: names for foreign alt text;
    hues: colours it also comes in (hue-rotated); plural: only where it is not the name with an s; other: a synonym.
    """

    code: str
    name: str
    height: float
    colour: str
    de: str
    es: str
    fr: str
    hues: tuple[str, ...] = ()
    plural: str = ""
    other: str = ""
    family: str = ""

    @property
    def many(self) -> str:
        return self.plural or self.name + "s"


_O = Object
_PAINT = ("red", "blue", "green", "yellow", "purple")
_FRUIT = (
    _O("1f34e", "apple", 0.08, "red", "Apfel", "manzana", "pomme", ("red", "green", "yellow")),
    _O("1f34c", "banana", 0.18, "yellow", "Banane", "plátano", "banane"),
    _O("1f350", "pear", 0.12, "green", "Birne", "pera", "poire", ("green", "yellow", "red")),
    _O("1f34d", "pineapple", 0.3, "yellow", "Ananas", "piña", "ananas"),
    _O("1f347", "bunch of grapes", 0.18, "purple", "Weintrauben", "uvas", "raisin", plural="bunches of grapes"),
    _O("1f353", "strawberry", 0.06, "red", "Erdbeere", "fresa", "fraise", plural="strawberries"),
    _O("1f349", "slice of watermelon", 0.2, "red", "Wassermelone", "sandía", "pastèque", plural="slices of watermelon"),
    _O("1f34b", "lemon", 0.09, "yellow", "Zitrone", "limón", "citron"),
    _O("1f34a", "orange", 0.09, "orange", "Orange", "naranja", "orange"),
    _O("1f351", "peach", 0.08, "pink", "Pfirsich", "melocotón", "pêche", plural="peaches"),
    _O("1f352", "pair of cherries", 0.06, "red", "Kirschen", "cerezas", "cerises", plural="pairs of cherries"),
    _O("1f965", "coconut", 0.14, "brown", "Kokosnuss", "coco", "noix de coco"),
)
_FOOD = (
    _O("1f354", "hamburger", 0.11, "brown", "Hamburger", "hamburguesa", "hamburger", other="burger"),
    _O("1f355", "slice of pizza", 0.22, "yellow", "Pizza", "pizza", "pizza", plural="slices of pizza"),
    _O("1f32d", "hot dog", 0.16, "orange", "Hotdog", "perrito caliente", "hot-dog"),
    _O("1f35f", "box of fries", 0.15, "red", "Pommes", "patatas fritas", "frites", plural="boxes of fries"),
    _O("1f382", "birthday cake", 0.25, "yellow", "Geburtstagstorte", "pastel de cumpleaños", "gâteau d'anniversaire"),
    _O("1f369", "donut", 0.1, "brown", "Donut", "rosquilla", "beignet", other="doughnut"),
    _O("1f950", "croissant", 0.12, "brown", "Croissant", "cruasán", "croissant"),
    _O("1f968", "pretzel", 0.13, "brown", "Brezel", "pretzel", "bretzel"),
    _O("1f9c0", "piece of cheese", 0.1, "yellow", "Käse", "queso", "fromage", plural="pieces of cheese"),
    _O("1f366", "ice cream cone", 0.2, "white", "Eistüte", "helado", "glace", other="soft ice cream"),
    _O("1f9c1", "cupcake", 0.1, "pink", "Muffin", "magdalena", "petit gâteau", ("pink", "blue", "green", "yellow")),
    _O("1f37f", "bucket of popcorn", 0.24, "red", "Popcorn", "palomitas", "pop-corn", plural="buckets of popcorn"),
)
_PLANTS = (
    _O("1f955", "carrot", 0.22, "orange", "Karotte", "zanahoria", "carotte"),
    _O("1f33d", "ear of corn", 0.26, "yellow", "Maiskolben", "mazorca", "épi de maïs", plural="ears of corn"),
    _O("1f346", "eggplant", 0.2, "purple", "Aubergine", "berenjena", "aubergine", other="aubergine"),
    _O("1f966", "head of broccoli", 0.18, "green", "Brokkoli", "brócoli", "brocoli", plural="heads of broccoli"),
    _O("1f345", "tomato", 0.07, "red", "Tomate", "tomate", "tomate", plural="tomatoes"),
    _O("1f344", "mushroom", 0.13, "red", "Pilz", "seta", "champignon", ("red", "blue", "purple", "yellow")),
    _O("1f335", "cactus", 1.3, "green", "Kaktus", "cactus", "cactus", plural="cacti"),
    _O("1f33b", "sunflower", 1.5, "yellow", "Sonnenblume", "girasol", "tournesol"),
    _O("1f339", "rose", 0.5, "red", "Rose", "rosa", "rose", ("red", "yellow", "purple", "blue")),
    _O("1fab4", "potted plant", 0.45, "green", "Topfpflanze", "maceta", "plante en pot"),
    _O("1f332", "pine tree", 3.2, "green", "Tanne", "pino", "sapin", other="fir tree"),
    _O("1f334", "palm tree", 3.6, "green", "Palme", "palmera", "palmier"),
)
_ANIMALS = (
    _O("1f415", "dog", 0.6, "brown", "Hund", "perro", "chien"),
    _O("1f408", "cat", 0.35, "brown", "Katze", "gato", "chat"),
    _O("1f404", "cow", 1.5, "white", "Kuh", "vaca", "vache"),
    _O("1f416", "pig", 0.8, "pink", "Schwein", "cerdo", "cochon"),
    _O("1f40e", "horse", 1.8, "brown", "Pferd", "caballo", "cheval"),
    _O("1f411", "sheep", 0.9, "white", "Schaf", "oveja", "mouton", plural="sheep"),
    _O("1f418", "elephant", 3.0, "grey", "Elefant", "elefante", "éléphant"),
    _O("1f992", "giraffe", 3.75, "orange", "Giraffe", "jirafa", "girafe"),
    _O("1f42a", "camel", 2.2, "brown", "Kamel", "camello", "chameau"),
    _O("1f405", "tiger", 1.0, "orange", "Tiger", "tigre", "tigre"),
    _O("1f993", "zebra", 1.6, "white", "Zebra", "cebra", "zèbre"),
    _O("1f98c", "deer", 1.4, "brown", "Hirsch", "ciervo", "cerf", plural="deer"),
)
_CREATURES = (
    _O("1f413", "rooster", 0.5, "brown", "Hahn", "gallo", "coq"),
    _O("1f986", "duck", 0.4, "white", "Ente", "pato", "canard"),
    _O("1f427", "penguin", 0.7, "black", "Pinguin", "pingüino", "manchot"),
    _O("1f989", "owl", 0.4, "brown", "Eule", "búho", "hibou"),
    _O("1f99c", "parrot", 0.35, "red", "Papagei", "loro", "perroquet"),
    _O("1f9a9", "flamingo", 1.2, "pink", "Flamingo", "flamenco", "flamant rose"),
    _O("1f99a", "peacock", 1.1, "green", "Pfau", "pavo real", "paon"),
    _O("1f407", "rabbit", 0.28, "white", "Hase", "conejo", "lapin"),
    _O("1f422", "turtle", 0.25, "green", "Schildkröte", "tortuga", "tortue"),
    _O("1f40c", "snail", 0.06, "brown", "Schnecke", "caracol", "escargot"),
    _O("1f980", "crab", 0.14, "red", "Krabbe", "cangrejo", "crabe"),
    _O("1f994", "hedgehog", 0.16, "brown", "Igel", "erizo", "hérisson"),
)
_VEHICLES = (
    _O("1f697", "car", 1.5, "red", "Auto", "coche", "voiture", _PAINT),
    _O("1f695", "taxi", 1.65, "yellow", "Taxi", "taxi", "taxi"),
    _O("1f68c", "bus", 2.9, "white", "Bus", "autobús", "autobus", plural="buses"),
    _O("1f69a", "truck", 2.7, "yellow", "Lastwagen", "camión", "camion", ("yellow", "blue", "green", "red"),
       other="delivery truck"),
    _O("1f69c", "tractor", 2.5, "green", "Traktor", "tractor", "tracteur", _PAINT),
    _O("1f6b2", "bicycle", 1.1, "red", "Fahrrad", "bicicleta", "vélo", _PAINT, other="bike"),
    _O("1f6f5", "motor scooter", 1.15, "red", "Motorroller", "moto", "scooter", _PAINT),
    _O("1f691", "ambulance", 2.4, "white", "Krankenwagen", "ambulancia", "ambulance"),
    _O("1f692", "fire engine", 3.1, "red", "Feuerwehrauto", "camión de bomberos", "camion de pompiers"),
    _O("1f681", "helicopter", 3.3, "orange", "Hubschrauber", "helicóptero", "hélicoptère", ("orange", "green", "blue")),
    _O("1f6f4", "kick scooter", 1.0, "blue", "Tretroller", "patinete", "trottinette", _PAINT),
    _O("1f682", "steam engine", 3.5, "red", "Dampflok", "locomotora", "locomotive", ("red", "green", "blue"),
       other="locomotive"),
)  # fmt: skip
_HOME = (
    _O("1fa91", "chair", 0.9, "brown", "Stuhl", "silla", "chaise"),
    _O("1f6c1", "bathtub", 1.2, "white", "Badewanne", "bañera", "baignoire"),
    _O("1f6bd", "toilet", 0.8, "white", "Toilette", "inodoro", "toilettes"),
    _O("1f6aa", "door", 2.0, "brown", "Tür", "puerta", "porte"),
    _O("23f0", "alarm clock", 0.17, "red", "Wecker", "despertador", "réveil"),
    _O("1faa3", "bucket", 0.32, "blue", "Eimer", "cubo", "seau", _PAINT),
    _O("1f392", "backpack", 0.45, "red", "Rucksack", "mochila", "sac à dos", _PAINT, other="rucksack"),
    _O("1f9f3", "suitcase", 0.65, "blue", "Koffer", "maleta", "valise", _PAINT),
    _O("1fad6", "teapot", 0.2, "red", "Teekanne", "tetera", "théière", _PAINT),
    _O("1f4fa", "television", 0.55, "grey", "Fernseher", "televisor", "télévision", other="TV"),
    _O("1f6d2", "shopping cart", 1.0, "grey", "Einkaufswagen", "carrito", "caddie"),
    _O("1fa9c", "ladder", 2.2, "brown", "Leiter", "escalera", "échelle"),
)
_PLAY = (
    _O("26bd", "soccer ball", 0.22, "blue", "Fußball", "balón de fútbol", "ballon de foot", ("blue", "red", "green")),
    _O("1f3c0", "basketball", 0.24, "orange", "Basketball", "balón de baloncesto", "ballon de basket"),
    _O("1f3c8", "american football", 0.2, "brown", "American Football", "balón de fútbol americano",
       "ballon de football américain"),
    _O("1f3be", "tennis racket", 0.65, "red", "Tennisschläger", "raqueta de tenis", "raquette de tennis", _PAINT),
    _O("1f3c6", "trophy", 0.4, "gold", "Pokal", "trofeo", "trophée", plural="trophies"),
    _O("1f94a", "boxing glove", 0.3, "red", "Boxhandschuh", "guante de boxeo", "gant de boxe", _PAINT),
    _O("1f9f8", "teddy bear", 0.38, "brown", "Teddybär", "osito de peluche", "ours en peluche"),
    _O("1f3b8", "electric guitar", 0.95, "red", "E-Gitarre", "guitarra eléctrica", "guitare électrique", _PAINT),
    _O("1f3ba", "trumpet", 0.5, "gold", "Trompete", "trompeta", "trompette"),
    _O("1f941", "drum", 0.42, "red", "Trommel", "tambor", "tambour", _PAINT),
    _O("1f3bb", "violin", 0.6, "brown", "Geige", "violín", "violon", other="fiddle"),
    _O("1fa97", "accordion", 0.45, "red", "Akkordeon", "acordeón", "accordéon", ("red", "blue", "green", "purple")),
)  # fmt: skip
_BY_FAMILY = {
    "fruit": _FRUIT, "food": _FOOD, "plants": _PLANTS, "animals": _ANIMALS,
    "small animals": _CREATURES, "vehicles": _VEHICLES, "household things": _HOME, "toys and instruments": _PLAY,
}  # fmt: skip

FAMILIES: tuple[str, ...] = tuple(_BY_FAMILY)
OBJECTS: tuple[Object, ...] = tuple(o._replace(family=f) for f, kinds in _BY_FAMILY.items() for o in kinds)
GROUNDS: tuple[str, ...] = ("grass", "sand", "wooden floor", "asphalt", "snow", "tiles")
SKIES: tuple[str, ...] = ("clear", "cloudy", "sunset", "overcast")
CLASSES: tuple[str, ...] = (*GROUNDS, "sky", *(o.name for o in OBJECTS))
SKY = len(GROUNDS)  # class id of the sky; object k has the id SKY + 1 + k
