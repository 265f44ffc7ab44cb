# SPDX-License-Identifier: Apache-2.0
"""What runs on the connected build host: lock, fetch, build, keys, sign.

``lock`` resolves every input under the rules of ``bundles/policy.yaml`` into ``bundles/locks/``;
``fetch`` brings the locked bytes into the content-addressed cache; ``build`` makes a bundle from the
cache with no network; ``keys`` and ``sign`` hold the release key. Only ``lock`` and ``fetch`` go out.
"""
