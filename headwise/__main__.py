"""Run the command as `python -m headwise`, or as `accelerate launch -m headwise` in several processes."""

from headwise.cli import main

if __name__ == "__main__":
    main()
