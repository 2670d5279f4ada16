"""Studies: many policies on many splits over many seeds, resumably, and what may be said of them.

``grid`` says what is run, ``cells`` runs one combination with the product's own simulation,
``runner`` runs all that is not done yet, ``figures`` turns results into tables with intervals,
``golden`` holds them to figures that are known, ``page`` writes them down. Must not train, choose
or score by itself.
"""
