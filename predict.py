"""Score images with an exported model, and say what is wrong with them; csad-predict where the package is installed."""

from csad.commands.score_images import run

if __name__ == "__main__":
    run()
