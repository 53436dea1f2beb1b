"""The Hub's upload calls: preupload, LFS, commits, repositories, branches and tags (docs/hub-api.md, "Uploading")."""
