"""jql-run as a module, for an environment whose Python is not the one that installed it."""

import sys

from jql_engine.cli.run import main

if __name__ == "__main__":  # workers import it anew
    sys.argv[0] = "jql-run"
    main()
