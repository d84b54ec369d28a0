"""Runs ``module:function`` of these packages in an interpreter that does not have them. Run as a script, never imported.

    python bootstrap.py '{"packages": {"shardproof.x": "folder", ...}, "call": "module:function", "args": [...]}'

Nothing is installed there: the packages are found in the given folders, before any that the interpreter has under the same name.
Needs nothing but the standard library of Python 3.10.
"""

import importlib
import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

FOLDERS = {}


class Packages:
    """A finder of the given packages and of the namespace that holds them; their modules are found as usual, by the package's folder."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of one of the packages, or None: another finder's business."""
        if name in FOLDERS:
            folder = FOLDERS[name]
            return spec_from_file_location(name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
        if any(package.startswith(name + ".") for package in FOLDERS):
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        return None


def main(request):
    """Make the packages importable, then call."""
    if sys.version_info < (3, 10):  # noqa: UP036 - any interpreter may be asked to run this file
        sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; the suite's workers need 3.10 or later")
    sys.path[0] = os.getcwd()  # as `python -m` has it; this script's own folder holds no module of anybody's
    FOLDERS.update(request["packages"])
    sys.meta_path.insert(0, Packages)
    module, _, function = request["call"].partition(":")
    getattr(importlib.import_module(module), function)(*request["args"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
