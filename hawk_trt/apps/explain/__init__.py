"""A picture of which visual tokens are kept.

explanation   a prompt and its results                -> its scores and kept tokens, on the grids of its images
picture       an explanation, and the images          -> a picture of them side by side
panels        one image                               -> under its scores in colour, or with its dropped tokens dimmed
lettering     texts in a picture
"""
