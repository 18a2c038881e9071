"""fiq: the Free Intelligence event pipeline.

A program that uses fiq's client may have a folder ``services`` of its own. If that has no ``__init__.py``, Python finds
this package instead; the package's path includes the folder, so the program's modules are found too.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
