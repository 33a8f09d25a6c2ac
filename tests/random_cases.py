"""How many random cases the losses and each protocol are compared on."""

import os

# More: RELDN_TEST_CASES=2000.
NUM_CASES = int(os.environ.get("RELDN_TEST_CASES", "500"))
