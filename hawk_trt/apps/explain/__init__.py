"""A picture of which visual tokens are kept.

explanation   a prompt and its results                -> its scores and kept tokens, on the grids of its images
picture       an explanation, and the images          -> a picture: each under its scores, its dropped tokens dimmed
lettering     texts in a picture
"""
