"""An inspection station: scores over HTTP, and a page for people; csad-serve where the package is installed."""

from csad.commands.run_station import main
from csad.errors import run_script

if __name__ == "__main__":
    run_script(main)
