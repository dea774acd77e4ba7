-- on_lineage(held_bound, last_run, run, step): whether the job's lineage took this step from this run. held_bound is the run's entry
-- in the hash lineage: '' is the run that goes on, a number the last step taken; a run without an entry is off, the newest excepted.
local function on_lineage(held_bound, last_run, run, step)
  if not held_bound then return run == last_run end
  return held_bound == '' or step <= tonumber(held_bound)
end
-- left_behind(held_bound): why a step that is not on the lineage is not, for people.
local function left_behind(held_bound)
  return held_bound and 'the job went on from an earlier step' or 'the job went on without this run'
end
