"""Which visual tokens are kept: the rule of HAWK, other selectors, and the choice for each prompt."""
