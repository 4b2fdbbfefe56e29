"""`search-r1 doctor`: what is wrong with this machine and this environment, and the cure."""
