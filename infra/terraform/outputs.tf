output "bucket_url" {
  description = "cluster.bucket of the recipe, and VALR_REMOTE_URL of infra/k8s/overlays/prod."
  value       = "s3://${aws_s3_bucket.store.bucket}/${var.prefix}"
}

output "image" {
  description = "Where to push the image; newName in infra/k8s/overlays/prod."
  value       = aws_ecr_repository.image.repository_url
}

output "role_arn" {
  description = "Annotation eks.amazonaws.com/role-arn of the service accounts in infra/k8s/overlays/prod."
  value       = aws_iam_role.bucket.arn
}
