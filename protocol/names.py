"""When two names are one name: used by the tree on the server and by clients that plan for it.

A folder holds one of `Résumé.TXT` and `résumé.txt`, whichever normal form each was typed in.
"""

from __future__ import annotations

import unicodedata


def name_key(name: str) -> str:
    """What makes a name unique in its folder: NFC of the case-folded NFD.

    Folding the decomposed form makes canonically equivalent names fold alike (Unicode 3.13,
    D145); composing the result keeps keys short.  Folds a whole path just as well: no separator
    is made or removed.
    """
    if name.isascii():
        return name.lower()
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFC", folded)
