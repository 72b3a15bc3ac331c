"""Where the build puts the native libraries, and ``build.json``, what it says about them (see ``setup.py``)."""
