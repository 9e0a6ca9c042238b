#!/usr/bin/env bash
# The GPU machine's own check, run by GitHub's runner before each job: any exit code but 0 ends the job before its first step.
# A workflow file cannot protect the machine from a pull request, which brings its own workflow files; this can.
# Install: copy it out of the runner's folder and name it in the runner's .env, then restart the runner:
#   ACTIONS_RUNNER_HOOK_JOB_STARTED=<folder>/job-started.sh
set -euo pipefail

refuse() {
  echo "::error::this machine runs only experiments.yml, dispatched from main or a version's tag: $1"
  exit 1
}

[[ "${GITHUB_EVENT_NAME:-}" == workflow_dispatch ]] || refuse "the event is '${GITHUB_EVENT_NAME:-}'"
[[ "${GITHUB_REF:-}" == refs/heads/main || "${GITHUB_REF:-}" == refs/tags/v* ]] || refuse "the ref is '${GITHUB_REF:-}'"
[[ "${GITHUB_WORKFLOW_REF:-}" == "${GITHUB_REPOSITORY:-}/.github/workflows/experiments.yml@$GITHUB_REF" ]] ||
  refuse "the workflow is '${GITHUB_WORKFLOW_REF:-}'"
