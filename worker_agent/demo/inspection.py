Inspection = None
inspect = None
