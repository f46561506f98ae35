# Access to the bucket for the service accounts of infra/k8s, by the cluster's identity provider: no keys anywhere.
data "aws_caller_identity" "current" {}

data "aws_eks_cluster" "this" {
  name = var.cluster_name
}

locals {
  service_accounts = ["valr-orchestrator", "valr-stage", "valr-mlflow"]
  oidc_issuer      = trimprefix(data.aws_eks_cluster.this.identity[0].oidc[0].issuer, "https://")
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = ["arn:aws:iam::${data.aws_caller_identity.current.account_id}:oidc-provider/${local.oidc_issuer}"]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.oidc_issuer}:sub"
      values   = [for account in local.service_accounts : "system:serviceaccount:${var.namespace}:${account}"]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.oidc_issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.store.arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = [var.prefix, "${var.prefix}/*"]
    }
  }

  # Versions can't be deleted with it: what a program overwrites or removes stays for 30 days.
  statement {
    sid       = "Objects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.store.arn}/${var.prefix}/*"]
  }
}

resource "aws_iam_role" "bucket" {
  name                 = "valr-bucket"
  assume_role_policy   = data.aws_iam_policy_document.trust.json
  max_session_duration = 43200
}

resource "aws_iam_role_policy" "bucket" {
  name   = "valr-bucket"
  role   = aws_iam_role.bucket.id
  policy = data.aws_iam_policy_document.bucket.json
}
