#!/bin/sh
# environment NAME [EXTRAS]: a virtual environment at /made/NAME/opt/helios with Helios and what the extras bring, in the
# versions of requirements/lock.txt, and the bill of materials of it (CycloneDX). Files bear SOURCE_DATE_EPOCH.
set -eu
name=$1 extras=${2:-}
wheel=$(echo /wheels/helios_llm-*.whl)
python -m venv --copies /opt/helios
if [ -n "$extras" ]; then
  /opt/helios/bin/pip install --constraint requirements/lock.txt "helios-llm[$extras] @ file://$wheel"
else
  /opt/helios/bin/pip install --no-deps "$wheel"
fi
/opt/helios/bin/pip uninstall --yes pip setuptools
mkdir -p "/made/$name/usr/share/sbom"
/opt/sbom/bin/cyclonedx-py environment --output-reproducible --of JSON -o "/made/$name/usr/share/sbom/$name.cdx.json" /opt/helios/bin/python
# Compiled once, here: read-only roots and other users can't. Of the sources' hashes, because times are all the same.
/opt/helios/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/helios/lib
mkdir -p "/made/$name/opt"
mv /opt/helios "/made/$name/opt/helios"
find "/made/$name" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
