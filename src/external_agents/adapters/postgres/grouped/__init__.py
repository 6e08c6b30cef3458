"""Group commit: the admissions and settlements of one moment share a call and a commit, and each waits for its own."""
