"""How often Python looks for garbage: rarely, in processes that are ours alone."""

import gc

_NUM_NEW_OBJECTS = 50_000
_NUM_COLLECTIONS = 20


def collect_rarely() -> None:
    """Looks for garbage after 50,000 new objects in place of Python's 700; to be called before anything is imported.

    Importing JAX and tracing a network make millions of objects that stay. Looking through them as often as Python does
    makes starts slower (`docs/resuming.md` has figures) and finds next to nothing: almost all that is not needed any
    more is freed at once, by its number of references. Programs and notebooks that import the package keep their own
    setting.
    """
    gc.set_threshold(_NUM_NEW_OBJECTS, _NUM_COLLECTIONS, _NUM_COLLECTIONS)
