"""Prepare text for training: python scripts/prepare_data.py --source FOLDER --out FOLDER (--help for the rest)."""

from longtrain.data.prepare import main

if __name__ == "__main__":
    main()
