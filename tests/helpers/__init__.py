"""What several test files need, as in `from helpers import reference`. There is no test in here."""
