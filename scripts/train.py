"""torchrun --nproc-per-node N scripts/train.py --recipe NAME_OR_PATH"""

from longtrain.cli import train_main

if __name__ == "__main__":
    train_main()
