"""Prepare text for training: python scripts/prepare_data.py --source SOURCE --out FOLDER (--help for the rest)."""

if __name__ == "__main__":
    # here, because worker processes import this file and need none of it
    from longtrain.cli.prepare import main

    main()
