"`python -m fastrecipes` is the command `fastrecipes`."
import sys

from fastrecipes.cli import main

if __name__ == '__main__': sys.exit(main())
