"""Real bytes as training text and as haystacks: numpy and the standard library only."""
