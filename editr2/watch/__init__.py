"""`editr2 watch`: a page of this machine alone that follows a run's folder, and changes nothing in
it.

follow.py reads what was added to the folder's files; view.py says what of it the page shows;
serve.py hands that on.
"""
