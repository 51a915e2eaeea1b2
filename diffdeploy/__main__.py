"""The command line as ``python -m diffdeploy``."""

from diffdeploy.cli.main import run

if __name__ == "__main__":
    run()
