"""What several test files need: `from helpers import reference`. It holds no test."""
