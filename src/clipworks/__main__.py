"""`python -m clipworks`, for launchers that start modules."""

from __future__ import annotations

from clipworks.cli import main

if __name__ == "__main__":
    main()
