"""`python -m dht`, which launchers of several processes start: `accelerate launch -m dht train ...`."""

from .cli import main

if __name__ == "__main__":
    main()
