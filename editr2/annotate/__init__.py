"""Sessions that object-centred rewards can judge: their fields added to sessions that lack them
(`annotate`), corrected by hand (`page`, `corrections`), and whole sessions built from images
(`make`)."""
