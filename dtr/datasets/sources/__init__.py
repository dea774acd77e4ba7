"""Where the files of a data set lie: found, measured, and copied into a bounded cache."""
