"""An inspection station: scores over HTTP, and a page for people; csad-serve where the package is installed."""

from csad.commands.run_station import run

if __name__ == "__main__":
    run()
