"""An inspection station: scores over HTTP, and a page for people; csad-serve where the package is installed."""

from csad.errors import run_script
from csad.station.run_station import main

if __name__ == "__main__":
    run_script(main)
