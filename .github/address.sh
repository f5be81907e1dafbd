#!/usr/bin/env bash
# Writes this repository's address (OWNER/NAME) into pyproject.toml and all that is derived from it, commits and pushes.
# Run by workflows/address.yml on every push; does nothing once the address is right.
set -euo pipefail
address="https://github.com/$1"
if grep -qF "Repository = \"$address\"" pyproject.toml; then
    echo "nothing to do: the address is $address"
    exit 0
fi
sed -i.bak "s|^Repository = .*|Repository = \"$address\"|" pyproject.toml && rm pyproject.toml.bak
"${PYTHON:-python}" -m saeutils.notebook.publish
git add pyproject.toml README.md notebooks figures/README.md
git -c user.name="github-actions" -c user.email="github-actions@users.noreply.github.com" \
    commit -qm "The address is now $address"
git push -q origin HEAD
echo "the address is now $address"
