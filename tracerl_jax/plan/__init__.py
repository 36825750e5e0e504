"""Will it fit, and how fast could it be: the programs of a run compiled ahead of time for chips that are not there."""
