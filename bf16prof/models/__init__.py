"""Model families: the exact list of parameters (`shapes`, no torch) and the torch modules that have them (`modules`).

A family is one file in each of the two packages, of the same name; there is no list to extend.
"""
