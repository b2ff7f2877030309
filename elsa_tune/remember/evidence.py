"""The SQL of evidence: the finals of a variant pooled, and the winner among the pools. Plain arithmetic, for any SQLite."""

from __future__ import annotations

from elsa_tune.measurement import DISTURBED

FAR = 0.97
"""Below this share of the best ratio nothing is tied, however wide the intervals are."""

TIED = 0.98
"""Within this share of the best ratio, or with intervals that overlap above FAR, variants are tied."""

ALIKE = 1.25
"""Errors within this factor are of the same rounding: among tied variants a larger one loses."""

NARROWEST = 0.02
"""What is added to a final's relative spread before it weighs: an interval may be narrow by luck."""

# What counts of a variant: finals against torch, of its newest code and torch, since its problem was last reopened (`era`,
# counted by each installation); clean ones, where there is a clean one. They weigh by the inverse square of their spread.
POOLED = f"""
WITH finals AS (
  SELECT * FROM recorded WHERE status = 'ok' AND stage = 'final' AND ratio > 0 {{where}}
), said AS (
  SELECT finals.*, spelled.content AS spelling,
    COALESCE(json_extract(p.content, '$.torch'), '') AS torch,
    COALESCE(json_extract(p.content, '$.disturbed'), 0) > {DISTURBED} AS disturbed,
    COALESCE(json_extract(p.content, '$.era'), 0) AS era, json_extract(p.content, '$.installation') AS place
  FROM finals JOIN texts spelled ON spelled.number = variant LEFT JOIN texts p ON p.number = provenance
  WHERE role = 'rival' OR (incumbent IS NOT NULL AND incumbent_role = 'rival')
), now AS (
  SELECT *, MAX(era) OVER (PARTITION BY device, problem, place) AS last_era FROM said
), newest AS (
  SELECT *, FIRST_VALUE(digest) OVER latest AS last_digest, FIRST_VALUE(torch) OVER latest AS last_torch
  FROM now WHERE era = last_era
  WINDOW latest AS (PARTITION BY device, problem, variant ORDER BY created DESC, id)
), same AS (
  SELECT *, MIN(disturbed) OVER (PARTITION BY device, problem, variant) AS least,
    1 / (ABS(COALESCE(ratio_high, 2 * ratio) - COALESCE(ratio_low, 0)) / ratio + {NARROWEST}) AS sharp
  FROM newest WHERE digest IS last_digest AND torch = last_torch
), counted AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY device, problem, variant ORDER BY created DESC, id) AS age
  FROM same WHERE disturbed = least
), pooled AS (
  SELECT number, id, device, problem, variant, role, spelling, disturbed, error, resources, MIN(age) AS age,
    COUNT(*) AS finals, GROUP_CONCAT(number) AS members, SUM(sharp * sharp * ratio) / SUM(sharp * sharp) AS ratio,
    SUM(sharp * sharp * COALESCE(ratio_low, 0)) / SUM(sharp * sharp) AS ratio_low,
    SUM(sharp * sharp * COALESCE(ratio_high, 2 * ratio)) / SUM(sharp * sharp) AS ratio_high
  FROM counted GROUP BY device, problem, variant
)"""

EVERY = f"{POOLED} SELECT * FROM pooled"

# A generated variant must beat torch beyond its interval, and one that was only ever timed on a busy machine does not
# outvote a clean one. Among variants tied with the best, those of the smallest error win, then fewer stack accesses, then who is within 2 % of the best,
# then the spelling, so that noise names nobody.
WINNERS = f"""{POOLED}, eligible AS (
  SELECT *, MIN(CASE role WHEN 'rival' THEN 1 ELSE disturbed END) OVER (PARTITION BY device, problem) AS least
  FROM pooled WHERE role = 'rival' OR ratio_low > 1
), ranked AS (
  SELECT *, FIRST_VALUE(ratio) OVER best AS best_ratio, FIRST_VALUE(ratio_low) OVER best AS best_low
  FROM eligible WHERE role = 'rival' OR disturbed = least
  WINDOW best AS (PARTITION BY device, problem ORDER BY ratio DESC, id)
), tied AS (
  SELECT r.*, MIN(r.error) OVER (PARTITION BY r.device, r.problem) AS least_error, r.ratio < {TIED} * best_ratio AS behind,
    COALESCE(json_extract(facts.content, '$.hot_spills'), 0) AS spills
  FROM ranked r LEFT JOIN texts facts ON facts.number = r.resources
  WHERE r.ratio >= {TIED} * best_ratio OR (r.ratio >= {FAR} * best_ratio AND r.ratio_high >= best_low)
), chosen AS (
  SELECT *, ROW_NUMBER() OVER (
    PARTITION BY device, problem ORDER BY error > {ALIKE} * least_error, spills, behind, spelling
  ) AS choice
  FROM tied
)
SELECT * FROM chosen WHERE choice = 1"""
