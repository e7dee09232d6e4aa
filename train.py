"""Train a vision transformer, make it smaller, and report: ``python train.py --help``."""

from lightning_mdc.app.main import main

if __name__ == "__main__":
    main()
