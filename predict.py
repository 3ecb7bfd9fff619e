"""Score images with an exported model, and say what is wrong with them; csad-predict where the package is installed."""

from csad.errors import run_script
from csad.inference.score_images import main

if __name__ == "__main__":
    run_script(main)
